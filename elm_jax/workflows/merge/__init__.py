"""The verb `elm merge`: opens, compares, plans and writes; on disk or in memory."""
