#!/usr/bin/env bash
# Builds a target of the Dockerfile where no Docker engine runs, and unpacks it:
#
#   scripts/build_image_daemonless.sh TARGET [OPTION…]     # OPTIONs go to `buildah build`, such as --build-arg or --secret
#
# buildah needs no daemon, and with chroot isolation no namespaces either; the base image is made by debootstrap, in place of
# the one that the Dockerfile pulls. Everything lies in IMAGE_STORE (default /var/tmp/encoder-svc-image; for TARGET cpu
# about 9 GB while it builds): delete it when done. Needs root, on a Debian or Ubuntu with buildah and debootstrap.
#
# Leaves IMAGE_STORE/TARGET/rootfs, the image's files, and IMAGE_STORE/TARGET/image.json, its configuration.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
target=$1
shift
repository=$(cd "$(dirname "$0")/.." && pwd)
store=${IMAGE_STORE:-/var/tmp/encoder-svc-image}
base=localhost/encoder-svc-base:bookworm
image=localhost/encoder-svc:$target

for program in buildah debootstrap; do
    command -v $program >/dev/null || { echo "$program is missing: apt-get install buildah debootstrap" >&2; exit 1; }
done

buildah() { command buildah --root "$store/storage" --runroot "$store/run" --storage-driver vfs "$@"; }

mkdir -p "$store"
if ! buildah inspect --type image $base >/dev/null 2>&1; then
    rm -rf "$store/base"
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$store/base"
    container=$(buildah from scratch)
    buildah copy --quiet "$container" "$store/base" /
    buildah commit --quiet --rm "$container" $base
    rm -rf "$store/base"
fi

buildah build --isolation chroot --format docker --target "$target" --tag "$image" \
    --build-arg PYTHON_IMAGE=$base "$@" "$repository"

rm -rf "${store:?}/$target" && mkdir -p "$store/$target"
buildah inspect --type image "$image" >"$store/$target/image.json"
container=$(buildah from "$image")
cp --archive "$(buildah mount "$container")" "$store/$target/rootfs"
buildah rm "$container" >/dev/null
echo "$image: $(du -sh "$store/$target/rootfs" | cut -f1) in $store/$target/rootfs"
