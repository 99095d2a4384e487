"""The SuperHOT experiment on the first embedded model: LoRAs for a longer context, curves, and the guide's tables."""
