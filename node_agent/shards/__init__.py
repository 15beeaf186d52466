"""From a GGUF file to shards: parsing, quantization, graphs, manifests. Pure; no file is opened here."""
