from isolation import no_attention_backend_chosen  # noqa: F401
