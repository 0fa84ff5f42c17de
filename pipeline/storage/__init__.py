"""Where artifacts live: a folder, or a bucket with a local cache."""
