"""Progressive extension as data: stages of searching, fine-tuning and searching again, each a folder of its own."""
