"""Video data: list files, decoding, frame sampling, transforms and the loader.

`pipeline` assembles the others: a list file (`lists`) and a schedule give every global step its
clips; `sampling` chooses the frames, `decode` reads them, `transforms` brings them to the size of
the step's bucket. Loader workers import these modules, so nothing here touches a JAX device.
"""
