# make install PREFIX=/usr/local DESTDIR= LIBDIR=$(PREFIX)/lib INCLUDEDIR=… BINDIR=…
# packaging/install.sh says what is laid out.

PREFIX ?= /usr/local
export PREFIX DESTDIR LIBDIR INCLUDEDIR BINDIR

install: ## headers, versioned library, command line, pkg-config, CMake into PREFIX
	CARGO='$(CARGO)' packaging/install.sh install

.PHONY: uninstall
uninstall: ## what install laid out, with the same PREFIX and DESTDIR
	CARGO='$(CARGO)' packaging/install.sh uninstall
