{{/* Which groups can hold a model's engines, as `deployments/app.py` asks Ray for them: a bundle a worker, all of one pod on
processors, packed over as few pods as can be on GPUs. */}}

{{/* Whether a model's engines take GPUs, as "true" or "". `auto` asks Ray what the cluster has, which is nothing while only the
head is up: here it means a GPU. Argument: model */}}
{{- define "galerne.onGpu" -}}
{{- if and (not (hasPrefix "fake:" .source)) (ne (dig "resources" "accelerator" "auto" .) "cpu") -}}true{{- end -}}
{{- end }}

{{/* Has every model say what it runs on. Argument: config */}}
{{- define "galerne.resolveAccelerators" -}}
{{- range .models -}}
{{- if include "galerne.onGpu" . -}}
{{- $_ := set . "resources" (mergeOverwrite (deepCopy (.resources | default dict)) (dict "accelerator" "gpu")) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Refuses a model that no group can hold, or that one could take whose image has no engine for it.
Argument: (list $ model) */}}
{{- define "galerne.placeable" -}}
{{- $values := (index . 0).Values -}}
{{- $model := index . 1 -}}
{{- $needs := dig "resources" dict $model -}}
{{- $onGpu := include "galerne.onGpu" $model -}}
{{- $fake := hasPrefix "fake:" $model.source -}}
{{- $type := ternary "" (dig "accelerator_type" "" $needs | default "") $fake -}}
{{- $gpus := float64 (dig "gpus" 1.0 $needs) -}}
{{- $cpus := float64 (dig "cpus" 1.0 $needs | default 1.0) -}}
{{- $workers := mul (dig "parallel" "tensor" 1 $model | int64) (dig "parallel" "pipeline" 1 $model | int64) -}}
{{- $build := ternary "gpu" "cpu" (eq $onGpu "true") -}}
{{- $place := 0 -}}
{{- $otherBuild := "" -}}
{{- range $name, $group := $values.workerGroups -}}
{{- $group := mergeOverwrite (deepCopy $values.workerGroupDefaults) (deepCopy ($group | default dict)) -}}
{{- $held := divf (float64 $group.cpu) $cpus | floor | int64 -}}
{{- if $onGpu -}}
{{- $held = min $held (divf (float64 $group.gpus) $gpus | floor | int64) -}}
{{- $held = mul $held (ternary $group.max $group.min $values.autoscaler.enabled | int64) ($group.hosts | int64) -}}
{{- else if lt $held $workers -}}
{{- $held = 0 -}}
{{- end -}}
{{- if and $held (or (not $type) (eq $type $group.acceleratorType)) -}}
{{- if or $fake (eq $build ($group.image.build | default $values.image.build)) -}}
{{- $place = add $place $held -}}
{{- else -}}
{{- $otherBuild = $name -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $of := ternary (printf " of type %s" $type) "" (ne $type "") -}}
{{- if $otherBuild -}}
{{- if $onGpu -}}
{{- fail (printf "model %q runs on GPUs, and workerGroups.%s, which could take it, has the image for processors: set its image.build to gpu and its image.tag to one that is, or name with resources.accelerator_type a group that has" $model.id $otherBuild) -}}
{{- else -}}
{{- fail (printf "model %q runs on processors, and workerGroups.%s, which could take it, has the image for GPUs: give a group without GPUs the other image (image.build: cpu, image.tag), an acceleratorType of its own, and name that in the model's resources.accelerator_type" $model.id $otherBuild) -}}
{{- end -}}
{{- end -}}
{{- if lt $place $workers -}}
{{- if not $onGpu -}}
{{- fail (printf "no workerGroup has the %v processors%s in a pod that model %q needs: raise cpu of a group" (mulf $workers $cpus) $of $model.id) -}}
{{- else if $place -}}
{{- fail (printf "model %q is %d workers (parallel), and at their most the workerGroups%s hold %d: raise gpus or cpu of a pod, hosts, or max (min without autoscaler.enabled)" $model.id $workers $of $place) -}}
{{- else -}}
{{- fail (printf "no workerGroup can hold model %q: it needs %v GPU(s)%s in a pod; add such a group, or set resources.accelerator: cpu" $model.id $gpus $of) -}}
{{- end -}}
{{- end -}}
{{- end }}
