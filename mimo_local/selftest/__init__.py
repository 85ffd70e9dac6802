"""Whether an accelerator computes what the CPU computes, on the user's machine, and how fast."""
