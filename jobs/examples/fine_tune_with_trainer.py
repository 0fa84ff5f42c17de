"""Fine-tune in transformers' Trainer and keep what the model knew.

python fine_tune_with_trainer.py MODEL_FOLDER DATA.jsonl OUTPUT_FOLDER
Lines of DATA: {"prompt": "Who runs the shop?", "answer": " Ada"} or {"text": ...}
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM as Model
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from agcl.integrations import transformers as agcl
from agcl.modulation import save_bases
from agcl.scoring.evaluate import text_loss_and_kl
from agcl.scoring.own_text import own_texts

folder, data, out = sys.argv[1:]
with Path(data).open(encoding="utf-8-sig") as lines:
    rows = [json.loads(line) for line in lines if line.strip()]
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # The collator pads.
model, base = (Model.from_pretrained(folder, dtype="float32") for _ in range(2))
basis = agcl.protect_base(model, tokenizer)  # From text that the model writes itself.
agcl.freeze_others(model, basis)  # Embeddings and norms have no inputs to keep off.
trainer = Trainer(
    model,
    TrainingArguments(out, num_train_epochs=3, learning_rate=1e-4, report_to="none"),
    train_dataset=agcl.tokenize_rows(tokenizer, rows),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    callbacks=[agcl.Protect(basis=basis)],
)
base.to(model.device)
unseen = own_texts(base, tokenizer, samples=32, tokens=64, seed=1)  # Other than the protected.
ids = [token for text in unseen for token in text.input_ids]
print("loss and KL before:", text_loss_and_kl(model, base, ids))
trainer.train()
print("loss and KL after:", text_loss_and_kl(model, base, ids), "nats per token")
trainer.save_model(out)
# Beside the folder, whose safetensors are taken for weights. A later task protects them as well.
save_bases(basis, Path(out).resolve().with_name("base.safetensors"))
