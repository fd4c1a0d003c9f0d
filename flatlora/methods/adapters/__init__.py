"""Adapter methods (`peft=NAME`), one file each."""
