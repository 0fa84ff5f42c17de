"""What one stage does: `fn(config, inputs, out_dir, context)`, callable without Ray."""
