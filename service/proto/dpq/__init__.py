"""The packages of the protocol buffers."""
