"""The truths that everything is held against. Never imports losses or trainers."""
