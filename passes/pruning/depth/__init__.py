"""Blocks and halves of blocks: passes that drop or share them."""
