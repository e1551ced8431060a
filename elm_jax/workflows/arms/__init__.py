"""Studies that compare networks (arms): equal data and steps, many small runs, paired differences."""
