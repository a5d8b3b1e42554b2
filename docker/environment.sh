#!/bin/sh
# Makes /opt/orthanc-events while an image is built: this package with every broker's client in a virtual environment of
# the image's own Python, from the locked packages, by hash. Nothing is compiled: the images have no compiler.
#
# Where packages were chosen outside (scripts/images.sh puts them into the folder `site`), no registry is asked.
set -eu
home=/opt/orthanc-events
version=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')

python3 -m venv --without-pip "$home"
if [ -d "site/$version" ]; then
    cp -r "site/$version/." "$home/lib/python$version/site-packages/"
else
    python3 -m venv --without-pip /tools
    pip() { python3 -m pip --python /tools/bin/python "$@"; }
    pip install --no-cache-dir --require-hashes -r requirements/build.txt
    pip wheel --no-cache-dir --require-hashes --no-build-isolation --wheel-dir /wheels -r requirements/bridge.txt
    pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .
    python3 -m pip --python "$home/bin/python" install --no-cache-dir --no-index --no-deps /wheels/*.whl
fi
"$home/bin/python" -m compileall -q "$home/lib" || true # what it can't compile is nothing that is imported

# The package's folder without the Python version in it, for the script that Orthanc loads.
ln -s "lib/python$version/site-packages/orthanc_events_bridge" "$home/package"
printf '#!/bin/sh\nexec %s/bin/python -m orthanc_events_bridge "$@"\n' "$home" >"$home/bin/orthanc-events"
chmod 755 "$home/bin/orthanc-events"
install -D -m 644 -t "$home/shim" config/orthanc_events.py
install -m 755 docker/health.py docker/start-orthanc.sh docker/first-start.sh docker/variables.sh "$home/"
