#!/bin/sh
# What one machine with one GPU runs, in order; each step may be a call of its own.
#
#   sh training/vlm/run.sh check|talk|probe|train|export|evaluate
#
# MINUTES is how long a call of `train` may take, TOTAL the minutes of training in all, BATCH the images in a step.
set -eu
PYTHON=${PYTHON:-python3}
MINUTES=${MINUTES:-8.5}
TOTAL=${TOTAL:-20}
BATCH=${BATCH:-64}
COMPILED=${COMPILED:---compiled}
PYTHONPATH="src:.:${PYTHONPATH:-}"
export PYTHONPATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

case "$1" in
    check) $PYTHON -m training.vlm.check ;;
    talk) $PYTHON -m training.vlm.talk ;;
    probe)
        # A minute, to choose by: images a second, and how many that makes in the whole plan.
        $PYTHON -m training.vlm.train --probe --minutes "${PROBE:-1}" --total "$TOTAL" --batch "$BATCH" "$COMPILED"
        ;;
    train) $PYTHON -m training.vlm.train --minutes "$MINUTES" --total "$TOTAL" --batch "$BATCH" "$COMPILED" ;;
    export) $PYTHON -m training.vlm.export && $PYTHON -m training.vlm.assemble ;;
    evaluate)
        MODEL=$($PYTHON -m training.vlm.assemble | tail -n 1)
        RESULTS=${RESULTS:-vlm-quick.jsonl}
        $PYTHON -c "from dymu.cli.main import main; main()" evaluate "$MODEL" \
            --task scenes/composed.py --task scenes/photos.py --method tome --budget 0.3 \
            --limit 270 --batch-size 32 --timed 0 --output "$RESULTS"
        ;;
    *) sed -n 2,6p "$0"; exit 2 ;;
esac
