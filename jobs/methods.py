"""`agcl methods`: every method by name, or what one of them sets."""

import argparse

import yaml

from agcl.errors import InputError
from pipeline.config.presets import METHODS, no_method


def main(arguments: argparse.Namespace, command: str) -> None:
    """Print one line per method; with a name, its settings, tuned setting and controls."""
    name = arguments.method
    if name is None:
        width = max(map(len, METHODS))
        for each, method in METHODS.items():
            print(f"{each:{width}}  {method.description}")
        return
    if name not in METHODS:
        raise InputError(no_method(name))
    method, knob = METHODS[name], METHODS[name].knob
    print(f"{name}: {method.description}")
    if method.variant_of:
        print(f"like {method.variant_of}, with")
    settings = method.changes if method.variant_of else method.sections
    print(yaml.safe_dump(settings, sort_keys=False).rstrip() if settings else "sets nothing")
    if knob:
        print(
            f"tuned in addition to the learning rate: {knob.key} from {knob.low:g} to {knob.high:g}"
        )
    if method.controls:
        print(f"compare with its controls: {', '.join(method.controls)}")
