"""The exchange of tokens between ranks that each hold some experts of a layer."""
