packer {
  required_version = ">= 1.14.2"

  required_plugins {
    amazon = {
      source  = "github.com/hashicorp/amazon"
      version = "= 1.5.0"
    }
  }
}
