#!/usr/bin/env bash
# Generates encoder_svc/_generated from protos/ with pinned tools in a venv of their own, so that the committed
# code loads on every protobuf runtime from 6.31 on (a newer compiler would raise that floor for each LM process).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-protos
[ -x $venv/bin/protoc-gen-mypy ] || { python3 -m venv $venv && $venv/bin/pip install -q grpcio-tools==1.76.0 "setuptools<81" mypy-protobuf==3.7.0; }
out=encoder_svc/_generated
rm -rf $out && mkdir -p $out
PATH="$PWD/$venv/bin:$PATH" $venv/bin/python -m grpc_tools.protoc -I protos \
  --python_out=$out --grpc_python_out=$out --mypy_out=quiet:$out --mypy_grpc_out=quiet:$out protos/encoder/v1/encoder.proto
# protoc writes imports for a top-level package `encoder`; ours live inside encoder_svc._generated.
sed -i 's/^from encoder\.v1 import/from encoder_svc._generated.encoder.v1 import/; s/^import encoder\.v1\.encoder_pb2$/import encoder_svc._generated.encoder.v1.encoder_pb2/; s/\bencoder\.v1\.encoder_pb2\./encoder_svc._generated.encoder.v1.encoder_pb2./g' \
  $(find $out -name '*_grpc.py' -o -name '*.pyi')
find $out -type d -exec touch {}/__init__.py \;
