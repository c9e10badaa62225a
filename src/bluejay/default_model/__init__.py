"""The default model: config, tokenizer and weights; README.md is its card."""
