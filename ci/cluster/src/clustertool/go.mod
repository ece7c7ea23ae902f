module clustertool

go 1.21
