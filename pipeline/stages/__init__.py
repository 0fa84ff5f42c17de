"""The stages: `fn(config, inputs, out_dir, context)`, callable without Ray."""
