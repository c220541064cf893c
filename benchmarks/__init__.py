"""Speed and memory of Consilience against physical floors and mergekit, measured in one run (`make bench`)."""
