"""Tokenizers in the formats of other programs: exported_program.py (torch.export), onnx_file.py (ONNX)."""
