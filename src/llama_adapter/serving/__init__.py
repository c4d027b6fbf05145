"""One base and its adapters behind OpenAI's HTTP interface."""
