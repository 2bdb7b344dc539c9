"""FedNano: federated tuning of multimodal LLMs by split inference."""

__version__ = "0.1.0"
