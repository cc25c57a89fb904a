# Sourced at the end of a batch script: requeue when the run can continue. The launcher's own exit code says
# nothing (it is 1 after any forwarded signal), the run folder does.
python -m spatialvlm.training.status "$RUN_DIR"
case $? in
  0) echo "finished" ;;
  75) scontrol requeue "$SLURM_JOB_ID" ;;
  *) exit 1 ;;
esac
