"""One file a command of ``lrpq``; heavy imports happen inside the functions, so that help is instant."""
