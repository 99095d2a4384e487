"""What every room uses: errors, JSON with types, short notations, memory, choices."""
