"""What a recipe will do and cost, computed before anything is trained: calendar, memory, bytes, the link's speed."""
