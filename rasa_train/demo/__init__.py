"""The embedded demo: a tiny Llama (``model/``) and a generator of word problems in MetaMathQA's shape."""
