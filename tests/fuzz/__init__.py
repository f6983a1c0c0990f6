"""What any bytes must not do to the parsers: laws as functions, and a fuzzer that looks for what breaks them."""
