"""All of Ray that a run needs: started or joined, workers, the channel between them, faults."""
