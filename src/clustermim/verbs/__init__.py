"""One file a verb: a public function whose signature is also its command line."""
