{{/* Models whose replicas KEDA decides: a Deployment that does nothing, for KEDA to scale, and its number for Galerne to
follow. Neither RayService nor RayCluster has a scale subresource that KEDA could act on. */}}

{{/* Name of a model's Deployment and ScaledObject: a label's length at most, and no two models the same.
Argument: (list $ model-id) */}}
{{- define "galerne.kedaName" -}}
{{- $id := index . 1 -}}
{{- $words := regexReplaceAll "[^a-z0-9]+" (lower $id) "-" | trunc 16 | trimAll "-" -}}
{{- printf "%s-keda-%s-%s" (include "galerne.short" (list (include "galerne.fullname" (index . 0)) 34)) $words (sha256sum $id | trunc 6) -}}
{{- end }}

{{/* Has the models of a configuration follow their Deployments. Argument: (list $ config) */}}
{{- define "galerne.follow" -}}
{{- $root := index . 0 -}}
{{- range $model := (index . 1).models -}}
{{- if hasKey $root.Values.keda.models $model.id -}}
{{- $query := printf "kube_deployment_spec_replicas{namespace=%q,deployment=%q}" $root.Release.Namespace (include "galerne.kedaName" (list $root $model.id)) -}}
{{- $_ := set $model "autoscaling" (merge (dict "external" (dict "query" $query)) ($model.autoscaling | default dict)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Refuses what KEDA could not act on, and says what to set. */}}
{{- define "galerne.validateKeda" -}}
{{- $values := .Values -}}
{{- $models := dict -}}
{{- range $values.config.models -}}{{- $_ := set $models .id . -}}{{- end -}}
{{- range $id, $_ := $values.keda.models -}}
{{- $model := get $models $id -}}
{{- if not $model -}}
{{- fail (printf "keda.models names %q, and config.models has no such model" $id) -}}
{{- end -}}
{{- if not (dig "replicas" "max" 0 $model) -}}
{{- fail (printf "keda.models names %q: set its replicas.max in config.models" $id) -}}
{{- end -}}
{{- if dig "autoscaling" "external" dict $model -}}
{{- fail (printf "keda.models names %q, whose autoscaling.external in config.models names another number to follow: keep one" $id) -}}
{{- end -}}
{{- if not $values.config.prometheus -}}
{{- fail "keda.models needs config.prometheus, which KEDA and Galerne both ask" -}}
{{- end -}}
{{- if $values.tenants.existingSecret -}}
{{- fail (printf "keda.models cannot have the configuration of tenants.existingSecret follow: leave it empty, and make a ScaledObject of your own for %q" $id) -}}
{{- end -}}
{{- $host := (urlParse ($values.keda.serverAddress | default $values.config.prometheus.url)).host | splitList ":" | first -}}
{{- if not (contains "." $host) -}}
{{- fail (printf "keda.serverAddress is empty, and KEDA does not find %q from its own namespace: set it to http://%s.NAMESPACE.svc:PORT" $host $host) -}}
{{- end -}}
{{- end -}}
{{- end }}
