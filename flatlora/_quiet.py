"""Hides messages that libraries log while they are imported, before a program can set up its logging."""

import logging

# If bitsandbytes is installed, importing PEFT logs that an optional CPU kernel is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# If DeepSpeed is installed, it logs on every import on a machine without a GPU that there is none.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
