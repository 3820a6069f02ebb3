{{/* Names, environment and pods that several templates share. */}}

{{- define "farm.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 24 | trimSuffix "-" -}}
{{- end }}

{{- define "farm.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: farm
{{ include "farm.selector" . }}
{{- end }}

{{/* What a selector may use: these never change. */}}
{{- define "farm.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* A pipeline's name as part of a Kubernetes name: `My_SDXL.v2` is `my-sdxl-v2-` and a hash. */}}
{{- define "farm.pipelineName" -}}
{{- $short := . | lower | replace "_" "-" | replace "." "-" | trunc 14 | trimAll "-" -}}
{{- if eq $short . }}{{ $short }}{{ else }}{{ printf "%s-%s" $short (sha256sum . | trunc 5) | trimPrefix "-" }}{{ end -}}
{{- end }}

{{- define "farm.workerName" -}}
{{- printf "%s-worker-%s" (include "farm.fullname" .root) (include "farm.pipelineName" .pipeline) -}}
{{- end }}

{{/* The enabled pipelines, with workerDefaults merged into each worker, as YAML. */}}
{{- define "farm.pipelines" -}}
{{- $all := dict -}}
{{- range $name, $entry := .Values.pipelines -}}
{{- if ne (get $entry "enabled" | toString) "false" -}}
{{- $worker := mergeOverwrite (deepCopy $.Values.workerDefaults) (deepCopy (default dict $entry.worker)) -}}
{{- $_ := set $all $name (dict "catalog" (default dict $entry.catalog) "worker" $worker) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.trial.enabled (not $all) -}}
{{- $cpu := dict "gpu" (dict "resource" "" "count" 0) "resources" (dict "requests" (dict "cpu" "1" "memory" "2Gi") "limits" (dict "memory" "4Gi")) -}}
{{- $_ := set $all "demo" (dict "catalog" dict "worker" (mergeOverwrite (deepCopy .Values.workerDefaults) $cpu)) -}}
{{- end -}}
{{- toYaml $all -}}
{{- end }}

{{/* The catalog as JSON: of one pipeline, or of all. Empty if the demo's own catalog is used. */}}
{{- define "farm.catalog" -}}
{{- $entries := dict -}}
{{- range $name, $entry := .pipelines -}}
{{- if $entry.catalog }}{{ $_ := set $entries $name $entry.catalog }}{{ end -}}
{{- end -}}
{{- if $entries }}{{ dict "pipelines" $entries | toJson }}{{ end -}}
{{- end }}

{{- define "farm.image" -}}
{{- $image := .root.Values.image -}}
{{- $name := get $image .kind -}}
{{- $digest := get $image.digests .kind -}}
{{- with $image.registry }}{{ . }}/{{ end }}{{ $name }}{{ if $digest }}@{{ $digest }}{{ else }}:{{ default .root.Chart.AppVersion $image.tag }}{{ end -}}
{{- end }}

{{- define "farm.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "farm.fullname" .) .Values.serviceAccount.name }}
{{- else }}{{ default "default" .Values.serviceAccount.name }}{{ end -}}
{{- end }}

{{- define "farm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* A reference to a value of a Secret: one that exists, the trial's, or one made from `url`. */}}
{{- define "farm.secretRef" -}}
{{- $own := printf "%s-servers" (include "farm.fullname" .root) -}}
secretKeyRef:
  name: {{ default $own .existing }}
  key: {{ ternary .key .ownKey (ne .existing "") }}
{{- end }}

{{/* Environment of every process: a map of name to value, or to a source. */}}
{{- define "farm.env" -}}
{{- $v := .Values -}}
FARM_DATABASE_URL:
  {{- include "farm.secretRef" (dict "root" . "existing" $v.database.existingSecret "key" $v.database.key "ownKey" "database") | nindent 2 }}
FARM_REDIS_URL:
  {{- include "farm.secretRef" (dict "root" . "existing" $v.redis.existingSecret "key" $v.redis.key "ownKey" "redis") | nindent 2 }}
FARM_S3_BUCKET: {{ $v.s3.bucket | quote }}
FARM_S3_ADDRESSING: {{ $v.s3.addressing | quote }}
AWS_DEFAULT_REGION: {{ $v.s3.region | quote }}
{{- if $v.trial.enabled }}
FARM_S3_ENDPOINT_URL: {{ printf "http://%s-s3:8333" (include "farm.fullname" .) | quote }}
{{- else if $v.s3.endpoint }}
FARM_S3_ENDPOINT_URL: {{ $v.s3.endpoint | quote }}
{{- end }}
{{- with default (ternary "http://localhost:8333" "" $v.trial.enabled) $v.s3.publicUrl }}
FARM_S3_PUBLIC_URL: {{ . | quote }}
{{- end }}
{{- if not (hasKey $v.settings "publicUrl") }}
{{- with default $v.api.ingress.host $v.api.route.host }}
FARM_PUBLIC_URL: {{ printf "https://%s" . | quote }}
{{- end }}
{{- end }}
{{- if or $v.s3.existingSecret $v.trial.enabled }}
AWS_ACCESS_KEY_ID:
  {{- include "farm.secretRef" (dict "root" . "existing" $v.s3.existingSecret "key" $v.s3.accessKeyIdKey "ownKey" "accessKeyId") | nindent 2 }}
AWS_SECRET_ACCESS_KEY:
  {{- include "farm.secretRef" (dict "root" . "existing" $v.s3.existingSecret "key" $v.s3.secretAccessKeyKey "ownKey" "secretAccessKey") | nindent 2 }}
{{- end }}
FARM_GRACE_SECONDS: {{ $v.graceSeconds | toJson | quote }}
{{- range $name, $value := $v.settings }}
FARM_{{ $name | snakecase | upper }}: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }}
{{- end }}
{{- end }}

{{/* The template of a pod with one container. Keys: root, component, kind (of image), args,
     resources, and optionally pipeline, own (overrides of podDefaults), env, onlyOwnEnv (true: not
     that of all processes), waitFor (a file that must exist first), command, volumes, mounts, tmpSize, container (probes and ports), grace, catalog (JSON), catalogName (its ConfigMap),
     runFolder (true: FARM_RUN_DIR), serviceAccount, restartPolicy. */}}
{{- define "farm.pod" -}}
{{- $root := .root -}}
{{- $pod := mergeOverwrite (deepCopy $root.Values.podDefaults) (deepCopy (default dict .own)) -}}
{{- $env := mergeOverwrite (ternary dict (include "farm.env" $root | fromYaml) (default false .onlyOwnEnv)) (default dict .env) -}}
{{- $annotations := dict -}}
{{- $mounts := list (dict "name" "tmp" "mountPath" "/tmp") -}}
{{- $volumes := list (dict "name" "tmp" "emptyDir" (dict "sizeLimit" (default "1Gi" .tmpSize))) -}}
{{- if .runFolder -}}
  {{- $_ := set $env "FARM_RUN_DIR" "/run/farm" -}}
  {{- $mounts = append $mounts (dict "name" "run" "mountPath" "/run/farm") -}}
  {{- $volumes = append $volumes (dict "name" "run" "emptyDir" (dict "sizeLimit" "1Mi")) -}}
{{- end -}}
{{- if .catalog -}}
  {{- $_ := set $env "FARM_PIPELINES" "/etc/farm/catalog.json" -}}
  {{- $_ := set $annotations "farm/catalog-checksum" (sha256sum .catalog) -}}
  {{- $mounts = append $mounts (dict "name" "catalog" "mountPath" "/etc/farm") -}}
  {{- $volumes = append $volumes (dict "name" "catalog" "configMap" (dict "name" .catalogName)) -}}
{{- end -}}
{{- with .pipeline }}{{ $_ := set $annotations "farm/pipeline" . }}{{ end -}}
{{- $env = mergeOverwrite $env $pod.env -}}
metadata:
  labels:
    {{- include "farm.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with .pipeline }}
    farm/pipeline: {{ include "farm.pipelineName" . }}
    {{- end }}
    {{- with $pod.labels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with mergeOverwrite $annotations $pod.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ .serviceAccount | default (include "farm.serviceAccount" $root) }}
  automountServiceAccountToken: false
  enableServiceLinks: false  # they would set FARM_… variables
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with .restartPolicy }}
  restartPolicy: {{ . }}
  {{- end }}
  {{- with .grace }}
  terminationGracePeriodSeconds: {{ . }}
  {{- end }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
  {{- with get $pod $key }}
  {{ $key }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- with .waitFor }}
  initContainers:
    - name: wait
      image: {{ include "farm.image" (dict "root" $root "kind" $.kind) | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [sh, -c, {{ printf "until test -e %s; do sleep 5; done" . | quote }}]
      securityContext:
        {{- include "farm.containerSecurity" $root | nindent 8 }}
      resources:
        requests: {cpu: 10m, memory: 16Mi}
        limits: {memory: 64Mi}
      volumeMounts:
        {{- toYaml $mounts | nindent 8 }}
        {{- toYaml $.mounts | nindent 8 }}
  {{- end }}
  containers:
    - name: {{ .component }}
      image: {{ include "farm.image" (dict "root" $root "kind" .kind) | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- with .command }}
      command: {{ toJson . }}
      {{- end }}
      args: {{ toJson .args }}
      securityContext:
        {{- include "farm.containerSecurity" $root | nindent 8 }}
      env:
        {{- range $name := keys $env | sortAlpha }}
        {{- $value := get $env $name }}
        - name: {{ $name }}
          {{- if kindIs "map" $value }}
          valueFrom:
            {{- toYaml $value | nindent 12 }}
          {{- else }}
          value: {{ $value | toString | quote }}
          {{- end }}
        {{- end }}
      resources:
        {{- toYaml .resources | nindent 8 }}
      {{- with .container }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      volumeMounts:
        {{- concat $mounts (default list .mounts) $pod.volumeMounts | toYaml | nindent 8 }}
  volumes:
    {{- concat $volumes (default list .volumes) $pod.volumes | toYaml | nindent 4 }}
{{- end }}

{{/* Probes on the files of FARM_RUN_DIR (ADR 29): no outage of a server fails them. */}}
{{- define "farm.fileProbes" -}}
startupProbe:
  exec: {command: [test, -e, /run/farm/beat]}
  periodSeconds: 2
  failureThreshold: 300
livenessProbe:
  exec: {command: [sh, -c, 'test $(( $(date +%s) - $(stat -c %Y /run/farm/beat) )) -lt 90']}
  periodSeconds: 20
  timeoutSeconds: 5
readinessProbe:
  exec: {command: [test, -e, /run/farm/ready]}
  periodSeconds: 5
{{- end }}

{{/* The file that the Job of mode download writes when everything is there. */}}
{{- define "farm.weightsMarker" -}}
{{- printf "%s/.fetched-%s" .weights.path (sha256sum .catalog | trunc 16) -}}
{{- end }}

{{- define "farm.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "farm.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* What the API serves to the outside, besides the page at `/`. The probes and /metrics, which
     need no key, stay inside the cluster. */}}
{{- define "farm.paths" -}}
[/v1, /openai, /p, /docs, /openapi.json, /static, /favicon.ico, /jobs, /operations, /lanes, /failures, /usage, /changes, /system, /workers, /submit, /updates, /views, /pictures, /login, /logout]
{{- end }}
