"""Layer instances in several processes, on one machine or many: ranks in a ring, rank 0 with everything else."""
