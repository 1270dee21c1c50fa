#!/bin/sh
# Fills the folder $2 with what `make test-transformers4` puts onto the path beside the environment of the Python $1:
# $2/transformers holds transformers 4.57, and $2/torchvision the library without which AutoProcessor of a
# LLaVA-OneVision cannot be made in any version.
set -eu
python=${1:?usage: setup_transformers4.sh PYTHON FOLDER}
folder=${2:?usage: setup_transformers4.sh PYTHON FOLDER}

install() {
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$folder/$1" $2
}

install transformers "transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2"
# The version of torchvision that belongs to the torch of the environment: 0.28 to 2.13, and so on.
minor=$("$python" -c "import torch; print(int(torch.__version__.split('.')[1]) + 15)")
install torchvision "torchvision==0.$minor.*"
