"""Who sees whom in a packed row, in the forms that attention takes."""
