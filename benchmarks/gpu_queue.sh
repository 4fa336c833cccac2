#!/usr/bin/env bash
# The experiments that wait for a GPU, most valuable first, each a few minutes; results are written as they come.
#
#   benchmarks/gpu_queue.sh RESULTS_DIR [FIRST [LAST]]      run entries FIRST..LAST (default: all)
#
# Needs: robustify installed with a CUDA torch; CIFAR-10 as DATA (default cifar10; `folder:cifar10_jpeg` does too).
# A robust ResNet-18 made by entry 2 is the start of entries 4 to 7.
set -u
out=${1:?where the results go}; first=${2:-1}; last=${3:-99}; data=${DATA:-cifar10}
mkdir -p "$out"
entry() { # number, name, command...
  local number=$1 name=$2; shift 2
  [ "$number" -ge "$first" ] && [ "$number" -le "$last" ] || return 0
  echo "== $number $name: $*" | tee -a "$out/queue.log"
  local begin=$SECONDS
  "$@" > "$out/$number-$name.log" 2>&1
  echo "   exit $? after $((SECONDS - begin)) s" | tee -a "$out/queue.log"
}
r18=robustbench_cifar10_linf_sehwag2021proxy_r18
wrn=robustbench_cifar10_linf_zhang2019theoretically
evals=(--set eval.n=2000 --set 'eval.attacks=[clean, fgsm, "pgd:steps=50", w-pgd]')

entry 1 step-cost python benchmarks/step_cost.py --model "$r18" --random --data "$data" --batch 512 --compile --out "$out/step_cost.json"
entry 2 r18-trades robustify finetune --model "$r18" --set model.pretrained=false --data "$data" --method trades --epochs 30 \
  --precision bf16 --set train.lr=0.1 --set train.schedule=cyclic --set train.batch_size=256 "${evals[@]}" -o "$out/r18-trades"
entry 3 wrn-fast-at robustify finetune --model "$wrn" --set model.pretrained=false --data "$data" --method fast-at --epochs 15 \
  --precision bf16 --set train.lr=0.1 --set train.schedule=cyclic "${evals[@]}" -o "$out/wrn-fast-at"
entry 4 r18-wasserstein-full robustify finetune cifar10-wasserstein --model "$out/r18-trades" --data "$data" "${evals[@]}" -o "$out/r18-w-full"
entry 5 r18-trades-control robustify finetune cifar10-trades --model "$out/r18-trades" --data "$data" --max-clean-drop 2 --set train.keep=last "${evals[@]}" -o "$out/r18-t-full"
entry 6 r18-wasserstein-last robustify finetune cifar10-wasserstein-last --model "$out/r18-trades" --data "$data" "${evals[@]}" -o "$out/r18-w-last"
entry 7 compare bash -c "for run in r18-w-full r18-t-full r18-w-last; do robustify evaluate $out/\$run --data $data --n 2000 --attack apgd-ce --attack apgd-t --threat Linf:8/255 --force -o $out/\$run-linf.json; robustify evaluate $out/\$run --data $data --n 2000 --attack knapsack --threat W2-Linf:4/255 --force -o $out/\$run-w2.json; done"
entry 8 step-cost-wrn python benchmarks/step_cost.py --model "$wrn" --random --data "$data" --batch 256 --compile --out "$out/step_cost_wrn.json"
entry 9 step-cost-cosine python benchmarks/step_cost.py --model "$out/r18-trades" --data "$data" --batch 512 --out "$out/step_cost_trained.json"
# several GPUs: times, exactness and bytes of every hook; on one GPU it would compare it with itself
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 1 ] && entry 10 scaling python -m torch.distributed.run --standalone --nproc-per-node "$gpus" benchmarks/scaling.py \
  --model "$r18" --batch $((256 * gpus)) --precision bf16 --rounds 10 -o "$out/scaling"
# the fast methods at size, the same network and epochs: one step against ten in both norms, and AccelAT against the rate it starts from
scratch=(--model "$r18" --set model.pretrained=false --data "$data" --epochs 15 --precision bf16 --set 'eval.attacks=[clean, apgd-ce, apgd-t]' --set eval.n=2000)
number=11
for threat in Linf:8/255 L2:0.5; do
  for method in fast-at pgd-at; do
    entry $number "r18-$method-${threat%%:*}" robustify finetune "${scratch[@]}" --threat "$threat" --method "$method" --set train.lr=0.1 --set train.schedule=cyclic -o "$out/r18-$method-${threat%%:*}"
    number=$((number + 1))
  done
done
for schedule in accelat constant plateau one-cycle; do
  entry $number "r18-$schedule" robustify finetune "${scratch[@]}" --epochs 40 --method fast-at --set train.lr=0.05 --set "train.schedule=$schedule" --set train.probe_images=2000 -o "$out/r18-$schedule"
  number=$((number + 1))
done
