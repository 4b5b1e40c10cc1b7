module blockem

go 1.23
