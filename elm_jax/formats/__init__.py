"""Models on disk in every form: readers give a `model.Model`, writers take one, tensor by tensor."""
