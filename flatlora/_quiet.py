"""What libraries say while they are imported, before a program could have set up its logging."""

import logging

# With bitsandbytes installed, PEFT's import tells every command that an optional kernel of its CPU code is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# With DeepSpeed installed, every command on a machine without a GPU tells that there is none.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
