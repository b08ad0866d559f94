"""The process that takes requests: admission, accounts, the start log, and what it asks of workers."""
