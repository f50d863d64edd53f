"""Import of tokenizers of other projects: `python -m stage1_tokenizer.import_weights FILE --family NAME --out RUN`.

    FILE -> engine/foreign_files.py: tensors -> architecture.py: our config -> conversion.py: our weights -> RUN

    from_taming.py      taming_vqgan (taming-transformers) and ibq (SEED-Voken)
    from_llamagen.py    llamagen_vq
    from_diffusers.py   diffusers_vq (VQModel) and diffusers_kl (AutoencoderKL)
    families.py         the union of these

All families have the network of the VQGAN paper, with other names for the same layers. So a family states the names of
its layers, and what its config says; the sizes are read from the shapes of its weights. What our network cannot express
is refused, with the name of the layer.
"""
