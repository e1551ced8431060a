"""Adapter folders of Hugging Face's package peft, which is not needed to read or write them."""
