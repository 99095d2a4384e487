"""Starting the ranks of a pipeline, what each of them loads, and how many layer instances it gets."""
