"""The words of the board's fields (label, hint) and losses, in each of its languages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")
Field = tuple[str, str]

FIELDS: dict[str, dict[str, Field]] = {
    "en": {
        "dpo_label_smoothing": ("Label smoothing", "Expected share of pairs whose labels are swapped."),
        "simpo_gamma": ("SimPO gamma", "Target margin between the chosen and the rejected response."),
        "dpop_lambda": (
            "DPOP lambda",
            "Weight of the penalty when the chosen response is less likely than under the reference.",
        ),
        "discopop_tau": ("DiscoPOP tau", "The smaller, the sharper the change from DPO's loss to the exponential one."),
        "sr_lambda": ("Refinement lambda", "Weight of the refinement term. 0 turns it off."),
        "ipo_length_normalize": ("Length normalization", "true: average over tokens. false: sum over tokens."),
        "ld_alpha": ("LD alpha", "Weight of the longer response's extra tokens (LD-DPO)."),
        "pref_bco_weight": ("BCO weight", "Weight of an added BCO loss. 0 turns it off."),
        "pref_loss_args": ("Loss arguments", "Keyword arguments of your loss, as JSON."),
        "sr_prompt": (
            "Refinement prompt",
            "The refinement term puts this text before the query. Clear the field to restore the default.",
        ),
        "ref_model": ("Reference model", "Path or hub name. Empty: the model you start from."),
        "precompute_ref_log_probs": (
            "Reference cache",
            "Compute the reference's log-probabilities before training. auto: where it does not change the result.",
        ),
        "ref_log_probs_cache_dir": ("Reference cache folder", "Empty: a folder in the user's cache."),
        "share_prefix": (
            "Share prefix",
            "Compute the shared prefix of both responses once. auto: where it does not change the result.",
        ),
        "pref_loss_file": ("Loss file", "Python file that registers your own loss. Press Enter to read it."),
        "pref_stop_on_degeneration": (
            "Stop on degeneration",
            "If the run degenerates, save a checkpoint and stop.",
        ),
        "reward_viewer": ("Normalized rewards", ""),
    },
    "ru": {
        "dpo_label_smoothing": ("Сглаживание меток", "Ожидаемая доля пар, в которых ответы перепутаны местами."),
        "simpo_gamma": ("Гамма SimPO", "Целевой отрыв выбранного ответа от отвергнутого."),
        "dpop_lambda": (
            "Лямбда DPOP",
            "Вес штрафа за выбранные ответы, которые стали менее вероятными, чем у эталонной модели.",
        ),
        "discopop_tau": ("Тау DiscoPOP", "Чем меньше, тем резче переход от функции потерь DPO к экспоненциальной."),
        "sr_lambda": ("Лямбда уточнения", "Вес уточняющего слагаемого. 0 отключает его."),
        "ipo_length_normalize": ("Нормировка по длине", "true: среднее по токенам. false: сумма по токенам."),
        "ld_alpha": ("Альфа LD", "Вес лишних токенов более длинного ответа (LD-DPO)."),
        "pref_bco_weight": ("Вес BCO", "Вес добавляемой функции потерь BCO. 0 отключает её."),
        "pref_loss_args": ("Аргументы функции потерь", "Именованные аргументы вашей функции потерь в формате JSON."),
        "sr_prompt": (
            "Промпт уточнения",
            "Уточняющее слагаемое ставит этот текст перед запросом. Очистите поле, чтобы вернуть текст по умолчанию.",
        ),
        "ref_model": ("Эталонная модель", "Путь или имя в хабе. Пусто: модель, с которой начинается обучение."),
        "precompute_ref_log_probs": (
            "Кэш эталонной модели",
            "Вычислить логарифмы вероятностей эталона заранее и хранить на диске. auto: если это не меняет результат.",
        ),
        "ref_log_probs_cache_dir": ("Папка кэша эталона", "Пусто: папка в кэше пользователя."),
        "share_prefix": (
            "Общий префикс",
            "Вычислять общий префикс обоих ответов один раз. auto: если это не меняет результат.",
        ),
        "pref_loss_file": (
            "Файл функции потерь",
            "Файл Python, который регистрирует вашу функцию потерь. Нажмите Enter, чтобы прочитать его.",
        ),
        "pref_stop_on_degeneration": (
            "Остановка при вырождении",
            "Если обучение вырождается, сохранить контрольную точку и остановиться.",
        ),
        "reward_viewer": ("Нормированные награды", ""),
    },
    "zh": {
        "dpo_label_smoothing": ("标签平滑", "预计标注颠倒的样本对所占比例。"),
        "simpo_gamma": ("SimPO gamma", "被选回答与被拒回答之间的目标间隔。"),
        "dpop_lambda": ("DPOP lambda", "被选回答的概率低于参考模型时的惩罚权重。"),
        "discopop_tau": ("DiscoPOP 的 tau", "越小，从 DPO 损失到指数损失的过渡越急。"),
        "sr_lambda": ("修正项 lambda", "修正项的权重。0 表示关闭。"),
        "ipo_length_normalize": ("长度归一化", "true：对词元取平均。false：对词元求和。"),
        "ld_alpha": ("LD alpha", "较长回答多出的词元的权重（LD-DPO）。"),
        "pref_bco_weight": ("BCO 权重", "附加的 BCO 损失的权重。0 表示关闭。"),
        "pref_loss_args": ("损失函数参数", "自定义损失函数的关键字参数，JSON 格式。"),
        "sr_prompt": ("修正项提示词", "修正项把这段文本放在问题之前。清空即恢复默认文本。"),
        "ref_model": ("参考模型", "路径或模型名称。留空：训练的起始模型。"),
        "precompute_ref_log_probs": (
            "参考模型缓存",
            "预先计算参考模型的对数概率并保存到磁盘。auto：在不改变结果时启用。",
        ),
        "ref_log_probs_cache_dir": ("参考缓存目录", "留空：用户缓存目录中的文件夹。"),
        "share_prefix": ("共享前缀", "两个回答的共享前缀只计算一次。auto：在不改变结果时启用。"),
        "pref_loss_file": ("损失函数文件", "注册自定义损失函数的 Python 文件。按回车读取。"),
        "pref_stop_on_degeneration": ("退化时停止", "训练退化时保存检查点并停止。"),
        "reward_viewer": ("归一化奖励", ""),
    },
    "ko": {
        "dpo_label_smoothing": ("레이블 스무딩", "레이블이 뒤바뀌었을 것으로 예상되는 쌍의 비율."),
        "simpo_gamma": ("SimPO 감마", "선택된 응답과 거부된 응답 사이의 목표 마진."),
        "dpop_lambda": ("DPOP 람다", "선택된 응답의 확률이 참조 모델보다 낮을 때의 페널티 가중치."),
        "discopop_tau": ("DiscoPOP 타우", "작을수록 DPO 로스에서 지수 로스로 급격하게 바뀝니다."),
        "sr_lambda": ("개선 항 람다", "개선 항의 가중치. 0이면 사용하지 않습니다."),
        "ipo_length_normalize": ("길이 정규화", "true: 토큰 평균. false: 토큰 합."),
        "ld_alpha": ("LD 알파", "더 긴 응답에서 초과하는 토큰의 가중치 (LD-DPO)."),
        "pref_bco_weight": ("BCO 가중치", "추가되는 BCO 로스의 가중치. 0이면 사용하지 않습니다."),
        "pref_loss_args": ("로스 인수", "사용자 로스 함수의 키워드 인수 (JSON)."),
        "sr_prompt": (
            "개선 항 프롬프트",
            "개선 항은 이 문장을 질문 앞에 붙입니다. 입력란을 비우면 기본값으로 돌아갑니다.",
        ),
        "ref_model": ("참조 모델", "경로 또는 허브 이름. 비워 두면 학습을 시작하는 모델을 씁니다."),
        "precompute_ref_log_probs": (
            "참조 모델 캐시",
            "참조 모델의 로그 확률을 미리 계산해 디스크에 저장합니다. auto: 결과가 바뀌지 않는 경우에만.",
        ),
        "ref_log_probs_cache_dir": ("참조 캐시 폴더", "비워 두면 사용자 캐시 안의 폴더를 씁니다."),
        "share_prefix": (
            "접두사 공유",
            "두 응답의 공통 접두사를 한 번만 계산합니다. auto: 결과가 바뀌지 않는 경우에만.",
        ),
        "pref_loss_file": ("로스 파일", "사용자 로스를 등록하는 Python 파일. Enter를 누르면 읽습니다."),
        "pref_stop_on_degeneration": ("퇴화 시 중지", "학습이 퇴화하면 체크포인트를 저장하고 중지합니다."),
        "reward_viewer": ("정규화된 보상", ""),
    },
    "ja": {
        "dpo_label_smoothing": ("ラベルスムージング", "ラベルが逆になっていると見込むペアの割合。"),
        "simpo_gamma": ("SimPO ガンマ", "選ばれた応答と拒否された応答の間の目標マージン。"),
        "dpop_lambda": ("DPOP ラムダ", "選ばれた応答の確率が参照モデルを下回ったときのペナルティの重み。"),
        "discopop_tau": ("DiscoPOP タウ", "小さいほど、DPO の損失から指数損失へ急に切り替わります。"),
        "sr_lambda": ("改善項のラムダ", "改善項の重み。0 で無効になります。"),
        "ipo_length_normalize": ("長さの正規化", "true：トークンの平均。false：トークンの合計。"),
        "ld_alpha": ("LD アルファ", "長い方の応答で超過するトークンの重み（LD-DPO）。"),
        "pref_bco_weight": ("BCO の重み", "追加する BCO 損失の重み。0 で無効になります。"),
        "pref_loss_args": ("損失関数の引数", "独自の損失関数のキーワード引数（JSON）。"),
        "sr_prompt": (
            "改善項のプロンプト",
            "改善項はこの文を質問の前に付けます。欄を空にすると既定の文に戻ります。",
        ),
        "ref_model": ("参照モデル", "パスまたはハブでの名前。空欄：学習を始めるモデル。"),
        "precompute_ref_log_probs": (
            "参照キャッシュ",
            "参照モデルの対数確率を事前に計算してディスクに保存します。auto：結果が変わらない場合のみ。",
        ),
        "ref_log_probs_cache_dir": ("参照キャッシュのフォルダ", "空欄：ユーザーのキャッシュ内のフォルダ。"),
        "share_prefix": (
            "接頭部の共有",
            "両方の応答に共通する接頭部を一度だけ計算します。auto：結果が変わらない場合のみ。",
        ),
        "pref_loss_file": ("損失関数ファイル", "独自の損失関数を登録する Python ファイル。Enter で読み込みます。"),
        "pref_stop_on_degeneration": ("退化時に停止", "学習が退化したらチェックポイントを保存して停止します。"),
        "reward_viewer": ("正規化報酬", ""),
    },
}

LOSSES: dict[str, dict[str, str]] = {
    "en": {
        "sigmoid": "DPO: widens the margin between the chosen and the rejected response without limit.",
        "hinge": "SLiC: like DPO, but ignores a pair once its margin reaches 1/beta.",
        "ipo": "IPO: moves the margin per token towards 1/(2 beta), so that it cannot grow without limit.",
        "kto_pair": "Pairwise KTO: compares each response with the batch's mean divergence from the reference.",
        "orpo": "ORPO: fine-tuning plus an odds-ratio term. It needs no reference model.",
        "simpo": "SimPO: compares likelihoods per token, with a target margin. It needs no reference model.",
        "minor_dpo": "MinorDPO: lowers a rejected response only while it is more likely than under the reference.",
        "dpop": "DPO-Positive: DPO with a penalty when the chosen response is less likely than under the reference.",
        "sr_dpo": "Sr-DPO: DPO whose target margin the model refines by judging both responses under a quality prompt.",
        "sr_ipo": "Sr-IPO: IPO whose target margin the model refines by judging both responses under a quality prompt.",
    },
    "ru": {
        "sigmoid": "DPO: неограниченно увеличивает отрыв выбранного ответа от отвергнутого.",
        "hinge": "SLiC: как DPO, но не учитывает пару, когда её отрыв достиг 1/beta.",
        "ipo": "IPO: приближает отрыв на токен к 1/(2 beta), чтобы он не рос без предела.",
        "kto_pair": "Парный KTO: сравнивает каждый ответ со средним расхождением пакета с эталонной моделью.",
        "orpo": "ORPO: дообучение с членом отношения шансов. Эталонная модель не нужна.",
        "simpo": "SimPO: сравнивает правдоподобия на токен с целевым отрывом. Эталонная модель не нужна.",
        "minor_dpo": "MinorDPO: понижает отвергнутый ответ, только пока он вероятнее, чем у эталонной модели.",
        "dpop": "DPO-Positive: DPO со штрафом за выбранные ответы, ставшие менее вероятными, чем у эталонной модели.",
        "sr_dpo": "Sr-DPO: DPO, где целевой отрыв уточняет сама модель, оценивая оба ответа при запросе качества.",
        "sr_ipo": "Sr-IPO: IPO, где целевой отрыв уточняет сама модель, оценивая оба ответа при запросе качества.",
    },
    "zh": {
        "sigmoid": "DPO：不断拉大被选回答与被拒回答之间的间隔，没有上限。",
        "hinge": "SLiC：类似 DPO，但间隔达到 1/beta 后忽略该样本对。",
        "ipo": "IPO：使每个词元的间隔趋近 1/(2 beta)，避免无限增大。",
        "kto_pair": "成对 KTO：把每个回答与批内相对参考模型的平均散度比较。",
        "orpo": "ORPO：微调加几率比项。不需要参考模型。",
        "simpo": "SimPO：比较每个词元的似然，并设目标间隔。不需要参考模型。",
        "minor_dpo": "MinorDPO：仅当被拒回答的概率高于参考模型时才压低它。",
        "dpop": "DPO-Positive：在 DPO 上惩罚概率低于参考模型的被选回答。",
        "sr_dpo": "Sr-DPO：模型在质量提示下评判两个回答，以修正 DPO 的目标间隔。",
        "sr_ipo": "Sr-IPO：模型在质量提示下评判两个回答，以修正 IPO 的目标间隔。",
    },
    "ko": {
        "sigmoid": "DPO: 선택된 응답과 거부된 응답의 마진을 제한 없이 넓힙니다.",
        "hinge": "SLiC: DPO와 같지만 마진이 1/beta에 이른 쌍은 무시합니다.",
        "ipo": "IPO: 토큰당 마진을 1/(2 beta)에 가깝게 하여 무한히 커지지 않게 합니다.",
        "kto_pair": "쌍 단위 KTO: 각 응답을 참조 모델에 대한 배치의 평균 발산과 비교합니다.",
        "orpo": "ORPO: 미세 조정에 오즈비 항을 더합니다. 참조 모델이 필요 없습니다.",
        "simpo": "SimPO: 목표 마진을 두고 토큰당 우도를 비교합니다. 참조 모델이 필요 없습니다.",
        "minor_dpo": "MinorDPO: 거부된 응답의 확률이 참조 모델보다 높을 때만 낮춥니다.",
        "dpop": "DPO-Positive: 선택된 응답의 확률이 참조 모델보다 낮아지면 페널티를 주는 DPO.",
        "sr_dpo": "Sr-DPO: 모델이 품질 프롬프트에서 두 응답을 평가해 DPO의 목표 마진을 다듬습니다.",
        "sr_ipo": "Sr-IPO: 모델이 품질 프롬프트에서 두 응답을 평가해 IPO의 목표 마진을 다듬습니다.",
    },
    "ja": {
        "sigmoid": "DPO：選ばれた応答と拒否された応答のマージンを際限なく広げます。",
        "hinge": "SLiC：DPO と同様ですが、マージンが 1/beta に達したペアを無視します。",
        "ipo": "IPO：トークンあたりのマージンを 1/(2 beta) に近づけ、際限なく大きくならないようにします。",
        "kto_pair": "ペア単位の KTO：各応答を、参照モデルに対するバッチの平均ダイバージェンスと比べます。",
        "orpo": "ORPO：ファインチューニングにオッズ比の項を加えます。参照モデルは不要です。",
        "simpo": "SimPO：目標マージンを置いてトークンあたりの尤度を比べます。参照モデルは不要です。",
        "minor_dpo": "MinorDPO：拒否された応答の確率が参照モデルより高い間だけ下げます。",
        "dpop": "DPO-Positive：選ばれた応答の確率が参照モデルを下回るとペナルティを加える DPO。",
        "sr_dpo": "Sr-DPO：モデルが品質プロンプトで両方の応答を評価し、DPO の目標マージンを調整します。",
        "sr_ipo": "Sr-IPO：モデルが品質プロンプトで両方の応答を評価し、IPO の目標マージンを調整します。",
    },
}


def about_loss(name: str, lang: str) -> str | None:
    """What a loss does, for those of the papers that this package is about and LLaMA-Factory's; None for others."""
    return in_language(lang, LOSSES).get(name)


def locales(langs: Iterable[str]) -> dict[str, dict[str, dict[str, str]]]:
    """The fields' words as LLaMA-Factory's `LOCALES` has them: component -> language -> its properties."""
    return {name: {lang: _properties(*in_language(lang, FIELDS)[name]) for lang in langs} for name in FIELDS["en"]}


def _properties(label: str, hint: str) -> dict[str, str]:
    return {"label": label, "info": hint} if hint else {"label": label}


def in_language(lang: str, texts: Mapping[str, T]) -> T:
    """The texts in a language; in English where there are none."""
    return texts.get(lang, texts["en"])
