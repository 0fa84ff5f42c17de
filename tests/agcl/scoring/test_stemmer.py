"""Porter's stemmer against NLTK's (mode NLTK_EXTENSIONS), a word or more for every rule."""

import pytest

from agcl.scoring.stemmer import stem

STEMS = """
skies:sky dying:die innings:inning news:news proceed:proceed as:as caresses:caress ponies:poni
ties:tie cats:cat miss:miss feed:feed agreed:agre plastered:plaster bled:bled motoring:motor
sing:sing conflated:conflat troubled:troubl sized:size hopping:hop tanned:tan falling:fall
hissing:hiss fizzed:fizz failing:fail filing:file died:die cried:cri using:use happy:happi sky:sky
say:say enjoy:enjoy by:by relational:relat conditional:condit rational:ration valenci:valenc
digitizer:digit conformabli:conform radicalli:radic differentli:differ vileli:vile
analogousli:analog vietnamization:vietnam predication:predic operator:oper feudalism:feudal
decisiveness:decis hopefulness:hope callousness:callous formaliti:formal sensitiviti:sensit
sensibiliti:sensibl hopefulli:hope geologi:geolog logi:logi triplicate:triplic formative:form
formalize:formal electriciti:electr electrical:electr hopeful:hope goodness:good revival:reviv
allowance:allow inference:infer airliner:airlin gyroscopic:gyroscop adjustable:adjust
defensible:defens irritant:irrit replacement:replac adjustment:adjust dependent:depend
adoption:adopt region:region homologou:homolog communism:commun activate:activ angulariti:angular
homologous:homolog effective:effect bowdlerize:bowdler probate:probat rate:rate cease:ceas
controll:control roll:roll generalizations:gener oscillators:oscil actualli:actual yes:ye toys:toy
day2:day2 3rd:3rd
"""


@pytest.mark.parametrize(("word", "expected"), [pair.split(":") for pair in STEMS.split()])
def test_stems_are_those_of_nltk(word, expected):
    assert stem(word) == expected
