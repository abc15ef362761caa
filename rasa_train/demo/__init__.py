"""The embedded demo: it fine-tunes a tiny Llama (``model/``) on generated word problems in MetaMathQA's format."""
